"""What training asks for between steps: forecasts, copies added late, owners for the steps to come."""
